"""`python -m lit_dpo`."""

from lit_dpo.cli import main

main()
