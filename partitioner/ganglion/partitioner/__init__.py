"""Model in, plan and shards out: checkpoint readers, families, graphs, quantizing, cutting, cost model, placement."""
