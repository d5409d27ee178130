"""Models on their way in and out: Hugging Face folders, Megatron's `.pt` files, packed 2:4 tensors.

Everything here streams: a model is a `Source` that gives one parameter at a time, whole, by its
name in megasparse. What a source becomes (a checkpoint, a model that trains) is `train`'s business.
"""
