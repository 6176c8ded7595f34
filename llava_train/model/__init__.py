"""From parts to a model that trains. This room never sees a file of samples."""
