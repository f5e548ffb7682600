"""`python -m unolora`, the same as `unolora`, but for how long threads spin: torch is here before that can be said."""

from unolora_cli import main

raise SystemExit(main())
