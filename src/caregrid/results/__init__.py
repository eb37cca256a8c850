"""Slot: one file per result format or destination. A format writes; a destination sends; neither decides."""
