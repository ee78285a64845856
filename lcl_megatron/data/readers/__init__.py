"""Readers of upstream formats: each yields ``Document`` and ``Reject`` records."""
