"""Imported first in processes that are ranks on the CPU: hides the machine's GPUs from them."""

import os

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
