"""``python -m lq_eval`` is ``lq-eval``."""

from lq_eval.cli import main

if __name__ == "__main__":
    main()
