"""The runs of compare_recipes.py and equal_time.py, as the flags that make each."""

from __future__ import annotations

from fractions import Fraction

FST = ["--sparsity-recipe", "fst", "--dense-tail-fraction", "0"]
EVERY_STEP = ["--mask-update-interval", "1"]
ALL_LINEARS = ["--sparse-layers", "*.mlp.*", "*.self_attention.linear_*"]
PLAIN = ["--masked-decay", "none", "--mask-update-interval", "none"]
SR_STE = ["--sparsity-recipe", "sr_ste", "--mask-update-interval", "none"]
FOLLOWED = ["--masked-decay", "none", "--masked-decay-rho", "0.05"]
S_STE = ["--sparsity-recipe", "s_ste", *PLAIN]
DENSE = ["--sparsity-recipe", "dense", *PLAIN]
VARIANTS = {
    "dense": DENSE,
    "fst": [*FST, *EVERY_STEP],
    "fst_tail": ["--sparsity-recipe", "fst", *EVERY_STEP],
    "fst_relaxed": ["--sparsity-recipe", "fst_relaxed", *EVERY_STEP],
    "s_ste": S_STE,
    "s_ste_3": [*S_STE, "--sparse-grad-input", "double-pruned"],
    "sr_ste": SR_STE,
    "ste": ["--sparsity-recipe", "ste", *PLAIN],
    "half": DENSE,  # and half of the FFN
}
ABLATIONS = {
    "dense_again": DENSE,
    "fst_every_10": [*FST, "--mask-update-interval", "10"],
    "fst_every_40": [*FST, "--mask-update-interval", "40"],
    "fst_mvue_approximate": [*FST, *EVERY_STEP, "--mvue", "approximate"],
    "fst_no_mvue": [*FST, *EVERY_STEP, "--mvue", "off"],
    "fst_no_decay": [*FST, *EVERY_STEP, "--masked-decay", "0"],
    "fst_decay_2e-4": [*FST, *EVERY_STEP, "--masked-decay", "2e-4"],
    "fst_decay_6e-4": [*FST, *EVERY_STEP, "--masked-decay", "6e-4"],
    "fst_decay_6e-3": [*FST, *EVERY_STEP, "--masked-decay", "6e-3"],
    "fst_rho": [*FST, *EVERY_STEP, *FOLLOWED],
    "fst_decay_before_clipping": [*FST, *EVERY_STEP, "--masked-decay-before-clipping"],
    "fst_relaxed_exact": [*FST, *EVERY_STEP, "--sparsity-phases", "fst:2/3,row+mvue=off:1/3"],
    "fst_all_linears": [*FST, *EVERY_STEP, *ALL_LINEARS],
    "sr_ste_double_pruned": [*SR_STE, "--sparse-grad-input", "double-pruned"],
    "sr_ste_rho": [*SR_STE, *FOLLOWED],
    "sr_ste_decay_2e-4": [*SR_STE, "--masked-decay", "2e-4"],
    "s_ste_scale_recomputed": [*S_STE, "--s-ste-scale", "every_step"],
    "s_ste_all_linears": [*S_STE, *ALL_LINEARS],
    "s_ste_3_all_linears": [*VARIANTS["s_ste_3"], *ALL_LINEARS],
}

# --fp8: on GPUs that have it.
FP8 = ["--fp8-format", "e4m3"]
IN_FP8 = {
    f"{name}_fp8": [*VARIANTS[name], *FP8]
    for name in ("dense", "fst", "fst_tail", "fst_relaxed", "s_ste", "s_ste_3")
}
ALL_VARIANTS = VARIANTS | ABLATIONS | IN_FP8

# The variant beside which another is seen too, in pairs of one seed.
_COMPARED = ("dense", "fst", "sr_ste", "s_ste_3", "s_ste")
BASES = {"fst_tail": "fst", "fst_relaxed": "fst", "s_ste_3": "s_ste"} | {
    name: name.removesuffix("_fp8")
    if name in IN_FP8
    else next(base for base in _COMPARED if name.startswith(f"{base}_"))
    for name in (*ABLATIONS, *IN_FP8)
}
# The run that another is until this share of its steps, so that a checkpoint of it is enough.
BRANCHES = {
    "fst_tail": ("fst", Fraction(5, 6)),
    "fst_relaxed": ("fst", Fraction(2, 3)),
    "fst_relaxed_exact": ("fst", Fraction(2, 3)),
}
