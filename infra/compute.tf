# Four queues, each with one managed EC2 environment: CPU and GPU, on demand and Spot. Jobs of several
# nodes run on demand only: Batch does not run them on Spot instances.

locals {
  kinds = {
    cpu = { instance_types = var.cpu_instance_types, image_type = "ECS_AL2023" }
    gpu = { instance_types = var.gpu_instance_types, image_type = "ECS_AL2023_NVIDIA" }
  }
  all_queues = {
    cpu      = { kind = "cpu", spot = false, grouped = false }
    cpu-spot = { kind = "cpu", spot = true, grouped = false }
    gpu      = { kind = "gpu", spot = false, grouped = var.gpu_placement_group }
    gpu-spot = { kind = "gpu", spot = true, grouped = false }
  }
  queues = { for name, queue in local.all_queues : name => queue if var.max_vcpus[name] > 0 }
}

resource "aws_launch_template" "this" {
  name_prefix            = "${var.name}-"
  description            = "Disk and metadata service of Batch instances of ${var.name}"
  update_default_version = true

  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      volume_size           = var.disk_gib
      volume_type           = "gp3"
      encrypted             = true
      delete_on_termination = true
    }
  }

  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
    # One hop ends at the instance: containers have their job's role, not the instance's.
    http_put_response_hop_limit = 1
  }

  # Batch adds its own part to a script in MIME form. Tags of images are never moved, so an image
  # that is there need not be asked for again.
  user_data = base64encode(<<-EOT
    MIME-Version: 1.0
    Content-Type: multipart/mixed; boundary="==PART=="

    --==PART==
    Content-Type: text/x-shellscript; charset="us-ascii"

    #!/bin/bash
    echo ECS_AWSVPC_BLOCK_IMDS=true >> /etc/ecs/ecs.config
    echo ECS_IMAGE_PULL_BEHAVIOR=prefer-cached >> /etc/ecs/ecs.config

    --==PART==--
  EOT
  )

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_batch_compute_environment" "this" {
  for_each = local.queues

  # Deleted before its roles, whose rights it needs to end its instances.
  depends_on = [aws_iam_role_policy.instance]

  name_prefix = "${var.name}-${each.key}-"
  type        = "MANAGED"

  compute_resources {
    type                = each.value.spot ? "SPOT" : "EC2"
    allocation_strategy = each.value.spot ? "SPOT_PRICE_CAPACITY_OPTIMIZED" : "BEST_FIT_PROGRESSIVE"
    instance_type       = local.kinds[each.value.kind].instance_types
    instance_role       = aws_iam_instance_profile.instance.arn
    min_vcpus           = 0
    max_vcpus           = var.max_vcpus[each.key]
    security_group_ids  = [aws_security_group.this.id]
    subnets             = each.value.grouped ? [var.subnet_ids[0]] : var.subnet_ids
    placement_group     = each.value.grouped ? aws_placement_group.gpu[0].name : null

    ec2_configuration {
      image_type = local.kinds[each.value.kind].image_type
    }

    launch_template {
      launch_template_id = aws_launch_template.this.id
      version            = aws_launch_template.this.latest_version
    }

    # The provider's default tags end at the environment; these are of instances and volumes.
    tags = merge(local.tags, { Name = "${var.name}-${each.key}" })
  }

  update_policy {
    job_execution_timeout_minutes = 60
    terminate_jobs_on_update      = false
  }

  lifecycle {
    # A queue needs its new environment before it lets go of the old one.
    create_before_destroy = true
  }
}

resource "aws_batch_job_queue" "this" {
  for_each = local.queues

  name     = "${var.name}-${each.key}"
  state    = "ENABLED"
  priority = 1

  compute_environment_order {
    order               = 1
    compute_environment = aws_batch_compute_environment.this[each.key].arn
  }
}
