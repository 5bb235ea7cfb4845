"""The training text of the demo models: grammars that write conversations, one module per category."""
