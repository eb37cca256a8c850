"""Slot: one file per input protocol. A door acknowledges only after the store has answered."""
