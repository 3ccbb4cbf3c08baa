"""Distillation trainers."""
