"""From text and examples to token shards, on local processes or on Apache Beam."""
