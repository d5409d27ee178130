"""The files of configs/: every model with every recipe, the experiments and the quickstart."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megasparse.config import RunConfig, load_config, resolve, smallest_world, to_dict
from megasparse.errors import ConfigError
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.sparsity.schedule import keeps_masks

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
# They have a teacher, masks of Wanda, a low-rank branch or scales.
NOT_FOR_EXPERTS = ("ast_gpt2", "ast_llama2", "cast_llama2")
WHOLE = [*sorted((CONFIGS / "experiments").glob("*.yaml")), CONFIGS / "quickstart.yaml"]


def load(*paths: Path, flags: tuple[str, ...] = ()) -> RunConfig:
    """Resolved for as many ranks as the layout needs."""
    argv = [word for path in paths for word in ("--config", str(path))]
    config = load_config([*argv, *flags])
    return resolve(config, smallest_world(config))


def settings(config: RunConfig) -> dict[str, object]:
    return {name: value for group in to_dict(config).values() for name, value in group.items()}


def written(path: Path) -> dict[str, object]:
    """What a file sets, by name."""
    tree = yaml.safe_load(path.read_text())
    return {name: value for group in tree.values() for name, value in group.items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_every_model_goes_with_every_recipe(model, recipe):
    if "num_experts" in written(model) and recipe.stem in NOT_FOR_EXPERTS:
        with pytest.raises(ConfigError, match="with num_experts is not supported"):
            load(model, recipe)
        return
    if "bert" in model.stem and "distillation" in yaml.safe_load(recipe.read_text()):
        with pytest.raises(ConfigError, match="kd_loss_weight .* with model_type bert"):
            load(model, recipe)
        return
    config = load(model, recipe)
    found, base, own = settings(config), settings(load(model)), written(recipe)
    assert recipe_of(config).name == recipe.stem.split("_gpt2")[0].split("_llama2")[0]
    folder = f"runs/{model.stem}_{recipe.stem}"
    own |= {"run_dir": folder, "save": f"{folder}/checkpoints"}
    own |= {"tensorboard_dir": f"{folder}/tensorboard"}
    # The recipe's settings, and for all others the model's.
    derived = {"lr_warmup_iters", "lr_decay_iters"}
    assert {name: found[name] for name in own} == own
    rest = found.keys() - own.keys() - derived
    assert {name: found[name] for name in rest} == {name: base[name] for name in rest}


@pytest.mark.parametrize("recipe", ["fst", "s_ste", "ast_llama2"])
def test_fine_tuning_keeps_what_is_sparse(recipe):
    flags = ("--load", "runs/a", "--finetune", "--tokenizer-model", "t", "--data-path", "d")
    files = [CONFIGS / "models/llama_8b.yaml", CONFIGS / f"recipes/{recipe}.yaml"]
    config = load(*files, CONFIGS / "finetune/sft.yaml", flags=flags)
    made = recipe_of(config)
    assert made.freeze_masks and keeps_masks(made) == (recipe != "s_ste")
    assert made.dense_tail_fraction == 0.0 and config.data.reset_attention_mask
    again = recipe_of(load(*files, CONFIGS / "finetune/sft.yaml", flags=(*flags, *_UNFROZEN)))
    assert not keeps_masks(again) and again.dense_tail_fraction == 0.1


_UNFROZEN = ("--no-freeze-masks", "--dense-tail-fraction", "0.1")


def test_models_and_recipes_set_different_things():
    for path in MODELS:
        tree = yaml.safe_load(path.read_text())
        assert not {"sparsity", "distillation", "fp8"} & tree.keys(), path
    for path in RECIPES:
        tree = yaml.safe_load(path.read_text())
        assert tree.keys() <= {"sparsity", "distillation", "train", "fp8"}, path
    assert not any("run_dir" in written(path) for path in [*MODELS, *RECIPES])


def test_the_papers_settings():
    fst = settings(load(CONFIGS / "models/gpt2_124m.yaml", CONFIGS / "recipes/fst_gpt2.yaml"))
    assert (fst["masked_decay"], fst["mask_update_interval"]) == (6e-5, 40)
    assert (fst["train_iters"], fst["global_batch_size"], fst["lr"]) == (300_000, 512, 1.5e-4)
    ast = settings(load(CONFIGS / "models/llama_8b.yaml", CONFIGS / "recipes/ast_llama2.yaml"))
    assert (ast["train_iters"], ast["global_batch_size"], ast["weight_decay"]) == (15_000, 128, 0.0)
    assert (ast["tensor_model_parallel_size"], ast["ffn_hidden_size"]) == (4, 14336)


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_experiments_and_the_quickstart_are_whole(path):
    assert load(path).checkpoint.run_dir.startswith("runs/")
