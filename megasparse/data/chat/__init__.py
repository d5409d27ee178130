"""Conversations: chat templates, tokens with a loss mask, and their packing into samples."""
