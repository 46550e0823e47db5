"""Preparing a corpus: text to token shards, on local processes or on Apache Beam."""
