"""What a Transformer layer is made of beside its linears: norms, attention, MLPs, sums."""
