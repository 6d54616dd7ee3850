from setuptools import setup

# Named one by one: find_packages() would also take folders of the checkout that are no part of the package.
setup(
    packages=["asyncdiff_fast", "asyncdiff_fast.kernels"],
    package_dir={"asyncdiff_fast.kernels": "kernels"},
)
