"""Model packages: add, sign, verify, retire. Nothing unsigned leaves this room."""
