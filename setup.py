"""How lowcomm is packaged: its requirements, its extras and the `lowcomm` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

HF = ["transformers>=4.57", "datasets>=4.0", "tokenizers>=0.22", "pyarrow>=18"]
REPORT = ["matplotlib>=3.9", "jinja2>=3.1"]
# the coordinator that decides who takes part in a round
ELASTIC = ["aiohttp>=3.11"]
# what benchmarks set beside lowcomm or read data with
BENCH = ["bitsandbytes>=0.50", "torchao>=0.18", "simpy>=4.1", "scikit-learn>=1.6"]
DEV = [
    "pytest>=8.4",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.120",
    "ruff>=0.14",
    "mypy>=1.18",
    "types-PyYAML>=6.0",
    "types-greenlet>=3.1",
    "pytorch_optimizer>=4.1",
    *HF,
    *REPORT,
    *ELASTIC,
    "scikit-learn>=1.6",  # a reference of tests
    "tensorboard>=2.18",
]


def version() -> str:
    """The version that lowcomm/__init__.py states, read without importing it (torch may not be installed yet)."""
    text = (ROOT / "lowcomm" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('lowcomm/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="lowcomm",
    version=version(),
    description="Low-communication distributed training: DiLoCo, Local SGD and their relatives, over one small Comm",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lowcomm", "lowcomm.*"]),
    package_data={"lowcomm": ["py.typed"], "lowcomm.report": ["*.html.j2", "*.css"], "lowcomm.coordinator": ["*.html"]},
    install_requires=[
        "torch>=2.9",
        "greenlet>=3.1",
        "numpy>=1.26",
        "jsonargparse[signatures]>=4.53",
        "PyYAML>=6.0",
        "rich>=13.7",
        "safetensors>=0.5",
    ],
    extras_require={
        "ray": ["ray>=2.50"],
        "deepspeed": ["deepspeed>=0.18"],
        "elastic": ELASTIC,
        "hf": HF,
        "report": REPORT,
        "dev": DEV,
        "bench": BENCH,
    },
    entry_points={"console_scripts": ["lowcomm = lowcomm.cli:main"]},
)
