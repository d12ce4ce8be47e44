"""``python -m lq_kernels``: the ``lq-kernels`` command."""

from lq_kernels.cli import main

if __name__ == "__main__":
    main()
