"""Max, average and power-average pooling, and max unpooling."""
