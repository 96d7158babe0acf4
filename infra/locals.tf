data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

locals {
  tags = merge({ Project = var.name }, var.tags)

  account   = data.aws_caller_identity.current.account_id
  partition = data.aws_partition.current.partition
  bucket    = coalesce(var.bucket_name, "${var.name}-${local.account}-${var.region}")
  log_group = "/aws/batch/${var.name}"

  # What jobs read and write in the bucket.
  checkout_prefix = "checkouts"
  runs_prefix     = "runs"
}
