# `terraform test`: what the files come to, worked out with a provider that makes nothing.

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "111122223333" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{\"Version\": \"2012-10-17\", \"Statement\": []}" }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::111122223333:role/mocked" }
  }
  mock_resource "aws_iam_instance_profile" {
    defaults = { arn = "arn:aws:iam::111122223333:instance-profile/mocked" }
  }
  mock_resource "aws_batch_compute_environment" {
    defaults = { arn = "arn:aws:batch:eu-central-1:111122223333:compute-environment/mocked" }
  }
  mock_resource "aws_ecr_repository" {
    defaults = { repository_url = "111122223333.dkr.ecr.eu-central-1.amazonaws.com/refrag" }
  }
}

variables {
  region     = "eu-central-1"
  vpc_id     = "vpc-0abc"
  subnet_ids = ["subnet-0aaa", "subnet-0bbb"]
}

run "defaults" {
  assert {
    condition     = jsondecode(aws_batch_job_definition.single.container_properties).image == "111122223333.dkr.ecr.eu-central-1.amazonaws.com/refrag:v1"
    error_message = "A job runs the image that was pushed."
  }
  assert {
    condition     = jsondecode(aws_batch_job_definition.multi.node_properties).nodeRangeProperties == [{ targetNodes = "0:", container = jsondecode(aws_batch_job_definition.single.container_properties) }]
    error_message = "Nodes run the same container, as many as a job asks for."
  }
  assert {
    condition     = jsondecode(aws_batch_job_definition.single.container_properties).secrets == []
    error_message = "There are no secrets that nobody gave."
  }
  assert {
    condition     = jsondecode(aws_batch_job_definition.single.container_properties).logConfiguration.options["awslogs-group"] == "/aws/batch/refrag"
    error_message = "Logs go to the log group."
  }
  assert {
    condition     = { for name, queue in aws_batch_job_queue.this : name => queue.name } == { cpu = "refrag-cpu", cpu-spot = "refrag-cpu-spot", gpu = "refrag-gpu", gpu-spot = "refrag-gpu-spot" }
    error_message = "The queues have the names that scripts/submit_batch.py expects."
  }
  assert {
    condition     = alltrue([for environment in aws_batch_compute_environment.this : environment.compute_resources[0].min_vcpus == 0])
    error_message = "Nothing runs while no job does."
  }
  assert {
    condition     = { for name, environment in aws_batch_compute_environment.this : name => environment.compute_resources[0].type } == { cpu = "EC2", cpu-spot = "SPOT", gpu = "EC2", gpu-spot = "SPOT" }
    error_message = "Only the -spot queues have Spot instances."
  }
  assert {
    condition     = aws_s3_bucket.this.bucket == "refrag-111122223333-eu-central-1"
    error_message = "The bucket's name is the account's own."
  }
  assert {
    condition     = length(aws_placement_group.gpu) + length(aws_vpc_endpoint.s3) + length(aws_budgets_budget.this) == 0
    error_message = "What nobody asked for is not made."
  }
  assert {
    condition = yamldecode(output.settings) == {
      region            = "eu-central-1"
      bucket            = "refrag-111122223333-eu-central-1"
      prefix            = "checkouts"
      cpu_queue         = "refrag-cpu"
      gpu_queue         = "refrag-gpu"
      cpu_spot_queue    = "refrag-cpu-spot"
      gpu_spot_queue    = "refrag-gpu-spot"
      single_definition = "refrag-single"
      multi_definition  = "refrag-multi"
      project           = "refrag"
    }
    error_message = "The settings are those of scripts/submit_batch.py."
  }
}

run "everything_on" {
  variables {
    name                = "other"
    gpu_placement_group = true
    route_table_ids     = ["rtb-0aaa"]
    max_vcpus           = { cpu = 16, cpu-spot = 0, gpu = 96, gpu-spot = 0 }
    monthly_budget_usd  = 500
    budget_emails       = ["somebody@example.com"]
    kms_key_arn         = "arn:aws:kms:eu-central-1:111122223333:key/mocked"
    secret_arns = {
      WANDB_API_KEY = "arn:aws:secretsmanager:eu-central-1:111122223333:secret:wandb-AbCdEf"
    }
  }

  assert {
    condition     = toset(keys(aws_batch_job_queue.this)) == toset(["cpu", "gpu"])
    error_message = "A queue without vCPUs is left out."
  }
  assert {
    condition     = aws_batch_compute_environment.this["gpu"].compute_resources[0].subnets == toset(["subnet-0aaa"])
    error_message = "A placement group lies in one zone."
  }
  assert {
    condition     = aws_batch_compute_environment.this["cpu"].compute_resources[0].subnets == toset(["subnet-0aaa", "subnet-0bbb"])
    error_message = "Only GPU instances are grouped."
  }
  assert {
    condition     = jsondecode(aws_batch_job_definition.single.container_properties).secrets == [{ name = "WANDB_API_KEY", valueFrom = "arn:aws:secretsmanager:eu-central-1:111122223333:secret:wandb-AbCdEf" }]
    error_message = "Secrets are named by their ARN."
  }
  assert {
    condition     = [for statement in data.aws_iam_policy_document.execution.statement : statement.resources if statement.sid == "ReadSecrets"] == [toset(["arn:aws:secretsmanager:eu-central-1:111122223333:secret:wandb-AbCdEf"])]
    error_message = "Exactly the secrets given may be read."
  }
  assert {
    condition     = yamldecode(output.settings).gpu_queue == "other-gpu" && output.log_group == "/aws/batch/other"
    error_message = "All names begin with the one given."
  }
  assert {
    condition     = alltrue([for statement in data.aws_iam_policy_document.submit.statement : anytrue([for condition in statement.condition : condition.variable == "aws:ResourceTag/Project" && contains(condition.values, "other")]) if statement.sid == "Cancel"]) && yamldecode(output.settings).project == "other"
    error_message = "People cancel the jobs of their own project, which submit_batch.py tags."
  }
}

run "a_secret_needs_its_arn" {
  command = plan

  variables {
    secret_arns = { WANDB_API_KEY = "0123456789" }
  }

  expect_failures = [var.secret_arns]
}

run "a_budget_needs_somebody_to_tell" {
  command = plan

  variables {
    monthly_budget_usd = 100
  }

  expect_failures = [var.budget_emails]
}

run "all_queues_are_named" {
  command = plan

  variables {
    max_vcpus = { cpu = 1 }
  }

  expect_failures = [var.max_vcpus]
}
