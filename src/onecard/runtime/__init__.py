"""From many callers to one card: batching, staging, and the engine that joins them. No HTTP and no Prometheus here."""
