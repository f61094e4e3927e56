"""Package layout. Everything that can be declared is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mimdet", "mimdet.*"]),
        "mimdet.kernels",
        "mimdet.configs",
        "mimdet.configs.common",
    ],
    package_dir={
        "mimdet": "mimdet",
        "mimdet.kernels": "kernels",
        "mimdet.configs": "configs",
        "mimdet.configs.common": "configs/common",
    },
)
