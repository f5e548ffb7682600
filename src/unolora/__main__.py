"""`python -m unolora`, the same as `unolora`."""

from unolora_cli import main

raise SystemExit(main())
