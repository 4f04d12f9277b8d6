"""Ship the top-level ``conf/`` inside the package: an installed wheel has no folder beside ``fedsb/``."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fedsb", "fedsb.*", "strategies", "strategies.*", "clients", "clients.*"]), "fedsb.conf"],
    package_dir={"fedsb.conf": "conf"},
    package_data={
        "*": ["py.typed"],
        "fedsb.report.page": ["page.*", "library/*"],
        "fedsb.conf": ["*.yaml", "**/*.yaml"],
        "fedsb.run": ["schemas/*.json"],
    },
)
