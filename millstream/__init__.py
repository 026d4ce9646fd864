"""Millstream turns prompts into streams."""
