"""Builds the optional CPU page kernels; everything else stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pdtransport.kernels._pages",
            sources=[
                "kernels/csrc/pages.c",
                "kernels/csrc/quant.c",
                "kernels/csrc/table.c",
            ],
            depends=["kernels/csrc/stripes.h"],
            # quant.c says the same as numpy does bit for bit, which a fused multiplication would not.
            extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-pthread"],
            extra_link_args=["-pthread"],
            # Without a C compiler the package installs all the same and uses the numpy reference.
            optional=True,
        )
    ]
)
