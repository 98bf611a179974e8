"""`python -m fastprob`, the same as the `fastprob` command."""

from fastprob.cli import main

raise SystemExit(main())
