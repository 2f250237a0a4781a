"""Blocks on local disks."""
