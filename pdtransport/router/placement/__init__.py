"""Placement policies: which server gets a request. Other packages add theirs by entry points."""
