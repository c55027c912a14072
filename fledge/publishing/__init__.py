"""Repositories for the Hub: their files and cards, a look before they are sent, and the sending."""
