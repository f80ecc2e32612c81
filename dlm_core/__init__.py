"""The data lifecycle manager: catalogue, policies and safety as plain functions."""
