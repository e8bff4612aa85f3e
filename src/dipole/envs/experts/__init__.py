"""Scripted experts that demonstrate tasks."""
