"""The trained model. Imports `model` and the chat and image code of `data`, never `train`."""
