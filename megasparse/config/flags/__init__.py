"""Flags of Megatron-LM and Megatron-DeepSpeed: one table, and what becomes of each."""
