"""Chains of runs, containers and AWS Batch."""
