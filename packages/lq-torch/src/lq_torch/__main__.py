"""``python -m lq_torch``: the ``lq`` command."""

from lq_torch.cli import main

if __name__ == "__main__":
    main()
