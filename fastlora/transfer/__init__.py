"""Transfer learning on pretrained models: weights, data, training and reports."""
