"""Bridges to the engines people run. No arithmetic here."""
