"""Looks at the data of a stage with the run's own tokenizer, template and packing, before a run; loads no weights."""
