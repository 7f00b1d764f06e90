"""What pyproject.toml has no settled word for: the compiled step of drawing, without which PyTorch draws."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "armchair.sample._native",
            ["src/armchair/sample/_native.c"],
            extra_compile_args=["-O3", "-g0", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,  # a machine without a C compiler installs all the same
        )
    ]
)
