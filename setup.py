"""What the package is called, needs and contains. Tool settings: pyproject.toml. Tested pins: requirements.txt."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "trlx" / "__init__.py").read_text(), re.MULTILINE).group(1)

REQUIRES = [
    "torch>=2.8,<2.14",
    "transformers>=5.0,<6",
    "accelerate>=1.10,<2",
    "omegaconf>=2.3,<3",
    "numpy>=1.26",
    "safetensors>=0.5",
    "tokenizers>=0.22",
    "psutil>=5.9",  # accelerate brings it
    "packaging>=23",  # transformers brings it
    "rich>=13",
    "tqdm>=4.66",
    "typer>=0.29,<1",  # transformers brings it
    "httpx2>=2.0,<3",  # transformers brings it
    "tenacity>=9,<10",
]
EXTRAS = {
    "wandb": ["wandb>=0.31"],
    "tensorboard": ["tensorboard>=2.16"],
    # alembic and SQLAlchemy are for mlflow.db, where MLflow writes by default
    "mlflow": ["mlflow-skinny>=3.0,<4", "alembic>=1.13", "sqlalchemy>=2.0"],
    "trackio": ["trackio>=0.43"],
    "report": ["matplotlib>=3.8"],
    "peft": ["peft>=0.18"],
    "bnb": ["bitsandbytes>=0.45"],
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "data": ["datasets>=3.0"],
    "math": ["math-verify>=0.8"],
    "sweep": ["ray[tune]>=2.60,<3", "optuna>=4"],
    "nemo": ["megatron-core>=0.16.1,<0.17", "einops>=0.8"],
    # only to prove that `.nemo` archives are NeMo's: tests/toolkit/exchange.sh, in an environment of its own
    "nemo-toolkit": ["nemo_toolkit[core]==3.0.0"],
    "docs": ["sphinx>=9.0,<10", "myst-nb>=1.4", "furo>=2025.12", "ipykernel>=7"],
    "bench": ["matplotlib>=3.8", "trl>=1.16,<2"],
}
EXTRAS["dev"] = [
    *(
        requirement
        for name in ("wandb", "tensorboard", "report", "peft", "data", "nemo", "sweep", "docs")
        for requirement in EXTRAS[name]
    ),
    "build>=1.2",
    "import-linter>=2.3",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "setuptools>=77",
]
PACKAGES = find_packages(include=["trlx", "trlx.*"])
# An editable install puts this folder on Python's path, where it finds the presets too. With a package_dir that names
# another folder, setuptools would install a finder of its own, which is asked last: in the folder above a clone that is
# named trlx, `import trlx` would take the clone for a package without modules.
EDITABLE = "editable_wheel" in sys.argv

setup(
    name="trlx",
    version=VERSION,
    description="Reinforcement learning from human feedback for language models: PPO, ILQL, DPO, SFT and RFT",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    # the presets live at the top level of the repository and inside the package once installed
    packages=PACKAGES if EDITABLE else [*PACKAGES, "trlx.configs"],
    package_dir={"": "."} if EDITABLE else {"trlx.configs": "configs"},
    package_data={
        "trlx.configs": ["**/*.yaml", "**/*.yml"],
        "trlx.launch": ["slurm/run.sh"],
        "trlx.report": ["parts/*"],
    },
    entry_points={"console_scripts": ["trlx=trlx.launch.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
