"""Installs Kilotron, editable, from its checkout: `pip install -c constraints.txt -e .`"""

from setuptools import setup

TENSORBOARD = ["tensorboard>=2.18"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "transformers>=5", *TENSORBOARD]
LINT = ["ruff>=0.14", "mypy>=1.18", "pre-commit>=4"]

setup(
    name="kilotron",
    version="0.1.0",
    description="Megatron's parallelism in kilo-lines: GPT pre-training that is proven equal to one process",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "checkpoint",
        "core",
        "data",
        "models",
        "monitoring",
        "parallel",
        "planning",
        "runtime",
        "settings",
        "settings.checks",
        "tools",
        "training",
        "verification",
    ],
    py_modules=["pretrain_gpt"],
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "hydra-core>=1.3.2,<1.4",
        "tiktoken>=0.8",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "rich>=13",
        "matplotlib>=3.8",
        "wandb>=0.31",
    ],
    extras_require={"tensorboard": TENSORBOARD, "test": TEST, "dev": TEST + LINT},
    entry_points={"console_scripts": ["kilotron=tools.cli:main"]},
)
