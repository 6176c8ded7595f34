"""From files to packed tensors. This room never sees a model.

A sample's way: record on disk -> `Sample` (samples) -> token ids and labels (chat) -> the packs of a step
(packing) -> `PackedBatch` with the pixels of its images (loader, images).
"""
