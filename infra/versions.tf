terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }

  # The state stays in this folder. For several people, keep it in S3 instead:
  # backend "s3" {
  #   bucket       = "..."
  #   key          = "refrag/terraform.tfstate"
  #   use_lockfile = true
  # }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = local.tags
  }
}
