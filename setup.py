"""What pyproject.toml has no settled word for: the compiled step of drawing, without which PyTorch draws."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "armchair.sample._native",
            [f"src/armchair/sample/_native{part}.c" for part in ("", "_avx512", "_avx2")],
            depends=[f"src/armchair/sample/_native{part}.h" for part in ("", "_step")],
            extra_compile_args=["-O3", "-g0", "-pthread", "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            optional=True,  # a machine without a C compiler installs all the same
        )
    ]
)
