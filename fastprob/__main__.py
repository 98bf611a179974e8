"""`python -m fastprob`, the same as the `fastprob` command."""

from fastprob_cli import main

raise SystemExit(main())
