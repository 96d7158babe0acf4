variable "region" {
  description = "AWS region of everything."
  type        = string
}

variable "name" {
  description = "What the names of all resources begin with."
  type        = string
  default     = "refrag"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,19}$", var.name))
    error_message = "name takes 2 to 20 small letters, digits and hyphens, and begins with a letter."
  }
}

variable "tags" {
  description = "Further tags of all resources, instances and volumes."
  type        = map(string)
  default     = {}
}

# Network

variable "vpc_id" {
  description = "VPC that the instances run in."
  type        = string
}

variable "subnet_ids" {
  description = "Subnets of the VPC. They need a way to the internet: a public address at launch, or a NAT gateway. Jobs of several nodes need private subnets with a NAT gateway, because each of their containers has a network interface of its own without a public address."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) > 0
    error_message = "subnet_ids needs at least one subnet."
  }
}

variable "route_table_ids" {
  description = "Route tables of the subnets, to give S3 a gateway endpoint: free, and checkouts and checkpoints then do not pass a NAT gateway. Leave it empty where the VPC has one."
  type        = list(string)
  default     = []
}

variable "gpu_placement_group" {
  description = "Puts the on-demand GPU instances close together: in the first of subnet_ids, in a cluster placement group. Faster between nodes, but more often without capacity."
  type        = bool
  default     = false
}

# Sizes and limits. Nothing runs while no job does: the least number of vCPUs is 0 everywhere.

variable "cpu_instance_types" {
  description = "Types or families of instances for the CPU queues; x86-64, as the image is."
  type        = list(string)
  default     = ["c7i", "m7i", "c6i", "m6i"]
}

variable "gpu_instance_types" {
  description = "Types or families of instances for the GPU queues."
  type        = list(string)
  default     = ["g6", "g5"]
}

variable "max_vcpus" {
  description = "The most vCPUs that run at once, by queue; 0 leaves a queue out."
  type        = map(number)
  default = {
    cpu      = 64
    cpu-spot = 64
    gpu      = 64
    gpu-spot = 64
  }

  validation {
    condition     = toset(keys(var.max_vcpus)) == toset(["cpu", "cpu-spot", "gpu", "gpu-spot"])
    error_message = "max_vcpus has to name cpu, cpu-spot, gpu and gpu-spot."
  }
}

variable "disk_gib" {
  description = "Size of an instance's disk, in GiB. It holds the image, models and the run folder."
  type        = number
  default     = 200
}

# Jobs: what a job gets that asks for nothing else.

variable "image_tag" {
  description = "Tag of the image that jobs run. Tags in the registry cannot be moved: push under a new one, and apply with its name."
  type        = string
  default     = "v1"
}

variable "job_vcpus" {
  description = "vCPUs of a job, and of each node of a job of several."
  type        = number
  default     = 4
}

variable "job_memory_mib" {
  description = "Memory of a job, and of each node of a job of several, in MiB."
  type        = number
  default     = 14000
}

variable "shared_memory_mib" {
  description = "The most shared memory that a container may use, in MiB; it counts towards its memory. Loader workers and NCCL fail with Docker's 64."
  type        = number
  default     = 8192
}

variable "job_timeout_hours" {
  description = "An attempt of a job is ended after so many hours."
  type        = number
  default     = 24
}

variable "job_attempts" {
  description = "How often a job is tried that names no number itself, as scripts/submit_batch.py does: one of a single node whose host was lost, or one of several whose main node failed."
  type        = number
  default     = 3

  validation {
    condition     = var.job_attempts >= 1 && var.job_attempts <= 10
    error_message = "job_attempts takes 1 to 10."
  }
}

# Secrets: made and filled by hand in Secrets Manager, so that no value is in Terraform's state.

variable "secret_arns" {
  description = "ARNs of Secrets Manager secrets (plain strings) by the variable that a job gets them as: WANDB_API_KEY, HF_TOKEN. Leave out what is not wanted."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(setsubtract(keys(var.secret_arns), ["WANDB_API_KEY", "HF_TOKEN"])) == 0
    error_message = "secret_arns takes WANDB_API_KEY and HF_TOKEN."
  }

  validation {
    condition = alltrue([
      for arn in values(var.secret_arns) :
      can(regex("^arn:[a-z-]+:secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:[^:]+$", arn))
    ])
    error_message = "secret_arns takes whole ARNs: arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME-xxxxxx."
  }
}

# Keeping things

variable "bucket_name" {
  description = "Name of the S3 bucket; NAME-ACCOUNT-REGION if null."
  type        = string
  default     = null
}

variable "kms_key_arn" {
  description = "A KMS key of yours for the bucket, the registry and the logs; AWS's own keys if null. Its policy has to let CloudWatch Logs use it."
  type        = string
  default     = null
}

variable "checkout_days" {
  description = "Sent checkouts are deleted after so many days. A job that starts later finds none."
  type        = number
  default     = 60
}

variable "noncurrent_days" {
  description = "Overwritten and deleted objects are kept for so many days. A run that writes its checkpoint every ten minutes pays for all of them so long."
  type        = number
  default     = 3
}

variable "log_days" {
  description = "Logs of jobs are kept for so many days."
  type        = number
  default     = 365
}

variable "num_images" {
  description = "So many images are kept in the registry; the oldest go."
  type        = number
  default     = 10
}

variable "force_destroy" {
  description = "Lets terraform destroy delete the bucket and the registry with all that is in them."
  type        = bool
  default     = false
}

# Cost

variable "monthly_budget_usd" {
  description = "Mails are sent at 80 % of this bill of the whole account, and when the month is forecast to exceed it; 0 for no budget. It stops nothing: max_vcpus does."
  type        = number
  default     = 0
}

variable "budget_emails" {
  description = "Who gets the budget's mails."
  type        = list(string)
  default     = []

  validation {
    condition     = var.monthly_budget_usd == 0 || length(var.budget_emails) > 0
    error_message = "a budget needs budget_emails."
  }
}
