"""The LightningModule, and what makes one transaction of an edit."""
